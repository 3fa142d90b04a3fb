"""Seeded synthetic chat conversations for the starter model."""
