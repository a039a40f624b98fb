"""The record for people: how it is built, tables, model card, one HTML page."""
