"""The record for people: tables, model card, one HTML page."""
