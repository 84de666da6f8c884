"""What the scripts in `launch/` ask of Python: `check` before a job is queued, `preflight` before it trains."""
