"""The contract with the disk: archives, their header, arrays and feature tables; readable without the rest."""
