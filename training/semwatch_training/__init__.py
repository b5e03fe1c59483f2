"""The learning side of semwatch: everything that needs torch."""
