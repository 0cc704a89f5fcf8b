"""What computes: the frozen parts, the trained ones, and the whole that they make."""
