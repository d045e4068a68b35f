"""Refs: found, made and looked up, with access proven."""
