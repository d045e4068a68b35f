"""Flights: one run of some work for all who want it."""
