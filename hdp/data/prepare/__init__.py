"""From files, tables and chats to a cache of tokens."""
