"""Where the time of a profiled run goes, by step: `python -m megatron_lighthouse.profiling report TRACE...`."""
