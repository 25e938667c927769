"""What is computed where: regions around sites, their price in each form, and the cheapest cut between them."""
