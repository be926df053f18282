"""Turns files, tables and chats into a token cache."""
