"""minizs: ZeroSearch (arXiv 2505.04588) from scratch; the README gives the order to read it in."""
