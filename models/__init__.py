"""Networks, schedules and samplers: enough to load a checkpoint and draw images from it."""
