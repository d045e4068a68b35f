"""Bringing bytes: pull, unlazy, extract, push."""
