rule paper_tables:
    """Every record and the page. Records are targets of their own, so that one that went missing is made anew."""
    default_target: True
    input:
        str(TABLES / "index.html"),
        RECORDS,


rule page:
    """Join what the papers report with the records: CSV, Markdown and one HTML page."""
    input:
        records=RECORDS,
        papers=[str(p) for p in sorted(papers.METHODS.glob("*/*")) if p.suffix in (".yaml", ".csv", ".md")],
        code=[str(p) for p in sorted(provenance.closure(papers.ROOT.glob("paper_tables/*.py")))],
        figures=[str(p) for p in sorted(papers.METHODS.glob("*/figures.py"))],
        page=[str(p) for p in sorted(papers.ROOT.glob("paper_tables/page.*"))],
    output:
        str(TABLES / "index.html"),
    params:
        runs=provenance.digest(sorted(RUNS)),  # another set of runs makes another page
    log:
        str(RESULTS / "logs" / "paper_tables.log"),
    shell:
        "{sys.executable} -m paper_tables {OVERRIDES} >{log} 2>&1"
