"""Training: the methods, the loop they share, and the engine that puts them on many GPUs."""
