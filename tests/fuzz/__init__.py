"""Random programs against an oracle of their own: `python -m tests.fuzz --graphs 10000 --seed 0`."""
