"""What all of the package may use: what callers set for torch, threads, and checks of arguments."""
