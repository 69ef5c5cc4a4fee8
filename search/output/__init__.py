"""What a study hands over: exports, checks of them, tables and the report page."""
