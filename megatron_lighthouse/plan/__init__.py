"""What a run will need and take, before it is queued; and what runs took, collected. See docs/plan.md."""
