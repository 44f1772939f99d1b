"""The paper's experiment and the command line that runs it; uses only kfoc's public names."""
