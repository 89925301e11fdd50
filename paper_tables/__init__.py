"""Join what papers report with run records: a site of HTML pages, with CSV, Markdown, LaTeX and BibTeX."""
