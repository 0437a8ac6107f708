"""The paper's tables on the catalogue world: what is trained for each row, and what came out. `srpo.reproduce` runs them."""
