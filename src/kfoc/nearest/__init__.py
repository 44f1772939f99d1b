"""Algorithm 1 of the paper: the closest Kronecker product to a sum, given its half steps."""
