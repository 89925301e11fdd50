rule record:
    """One run, one record. The address holds every parameter and the hash of the sources."""
    output:
        str(RESULTS / "records" / "{address}.json"),
    threads: 1
    resources:
        gpu=lambda wildcards: int(RUNS[wildcards.address].scale == "paper" and bool(SETTINGS["gpu"])),
    log:
        str(RESULTS / "logs" / "{address}.log"),
    shell:
        "OMP_NUM_THREADS={threads} {sys.executable} -m common run-record {wildcards.address} {OVERRIDES} >{log} 2>&1"
