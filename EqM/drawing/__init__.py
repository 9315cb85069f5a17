"""Pictures for people: plots and contact sheets."""
