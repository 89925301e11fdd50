rule paper_tables:
    """Join what the papers report with the records: CSV, Markdown and one HTML page."""
    default_target: True
    input:
        records=RECORDS,
        papers=[str(p) for p in sorted(papers.METHODS.glob("*/*")) if p.suffix in (".yaml", ".csv", ".md")],
        code=[str(p) for p in sorted((papers.ROOT / "paper_tables").glob("*.py"))],
    output:
        str(TABLES / "index.html"),
    log:
        str(RESULTS / "logs" / "paper_tables.log"),
    shell:
        "{sys.executable} -m paper_tables {OVERRIDES} >{log} 2>&1"
