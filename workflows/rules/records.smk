# One run makes one record. Runs of a kind share a process, so that libraries are loaded once a batch; records that
# exist already are inputs like any other. With batch=1 (clusters) every run is a job of its own.
if int(SETTINGS["batch"]) > 1:
    for number, addresses in enumerate(papers.batches(RUNS, RESULTS, int(SETTINGS["batch"]))):

        rule:
            name:
                f"records_{RUNS[addresses[0]].kind}_{number}"
            output:
                [str(RUNS[address].path(RESULTS)) for address in addresses],
            params:
                addresses=" ".join(addresses),
            threads: 1
            resources:
                gpu=int(bool(SETTINGS["gpu"]) and RUNS[addresses[0]].scale == "paper"),
            log:
                str(RESULTS / "logs" / f"{addresses[0]}.log"),
            shell:
                "OMP_NUM_THREADS={threads} {sys.executable} -m common run-records {params.addresses} {OVERRIDES} >{log} 2>&1"

else:

    rule record:
        output:
            str(RESULTS / "records" / "{address}.json"),
        threads: 1
        resources:
            gpu=lambda wildcards: int(bool(SETTINGS["gpu"]) and RUNS[wildcards.address].scale == "paper"),
        log:
            str(RESULTS / "logs" / "{address}.log"),
        shell:
            "OMP_NUM_THREADS={threads} {sys.executable} -m common run-records {wildcards.address} {OVERRIDES} >{log} 2>&1"
