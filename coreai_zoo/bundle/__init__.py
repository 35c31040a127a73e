"""The LanguageBundle on disk: its records read, its files checked, text generated with it."""
