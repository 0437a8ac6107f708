"""Step rewards (Eq. 5): who grades each step of a response, and the judge R_phi."""
