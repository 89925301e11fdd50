# What the page is made from besides records, noted by content: times of files say little once a clock jumped.
MADE_FROM = [
    *(p for p in papers.METHODS.glob("*/*") if p.suffix in (".yaml", ".csv", ".md") or p.name == "figures.py"),
    *provenance.closure(ROOT.glob("paper_tables/*.py")),
    *(p for p in ROOT.glob("paper_tables/*") if p.suffix in (".html", ".css", ".js")),
    *ROOT.glob("configs/**/*.yaml"),
    ROOT / "CITATION.cff",
]
NOTE = RESULTS / "made_from.json"
if workflow.is_main_process:
    try:
        workspace.check_writable(RESULTS, [TABLES / "index.html", *map(Path, RECORDS)])
        workspace.note_inputs(NOTE, SETTINGS, map(Path, RECORDS), MADE_FROM)
        workspace.settle(made=[TABLES / "index.html"], made_from=[NOTE, *map(Path, RECORDS)])
    except PrunelabError as error:
        sys.exit(f"error: {error}")


rule paper_tables:
    """Every record and the page. Records are targets of their own, so that one that went missing is made anew."""
    default_target: True
    input:
        str(TABLES / "index.html"),
        RECORDS,


rule page:
    """Join what the papers report with the records: a site of HTML pages, with CSV, Markdown, LaTeX and BibTeX."""
    input:
        records=RECORDS,
        note=local(str(NOTE)),
    output:
        str(TABLES / "index.html"),
    log:
        str(RESULTS / "logs" / "paper_tables.log"),
    shell:
        "{sys.executable} -m prunelab.paper_tables {OVERRIDES} >{log:q} 2>&1"
