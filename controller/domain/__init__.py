"""Vocabulary of the controller as values: request classes, SLOs, reasons, layouts, decisions. Imports only common."""
