"""Join what papers report with run records: CSV, Markdown and one self-contained HTML page."""
