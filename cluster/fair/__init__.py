"""Sharing what a process has between those who ask for it, so that none starves another."""
