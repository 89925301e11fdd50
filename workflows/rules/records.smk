rule records:
    """Every record and no page: for clusters whose files lie elsewhere, so that the page is made at home."""
    input:
        RECORDS,


def folder(wildcards, output):
    """The results folder in which a job works: where records are kept in a storage, a copy of a part of it."""
    return str(Path(output[0]).parent.parent)


def gpus(address):
    """How many GPUs the job of a run takes."""
    return RUNS[address].gpus if SETTINGS["gpu"] and RUNS[address].scale == "paper" else 0


# Jobs that a cluster starts plan anew, when records of theirs may be there already: there every record has its rule.
OPEN = planning.batches(RUNS, RESULTS, 1) if workflow.is_main_process else [list(RUNS)]


# One run makes one record. Runs of a kind share a process, so that libraries are loaded once a batch; records that
# exist already are inputs like any other. With batch=1 (clusters) every run is a job of its own.
if int(SETTINGS["batch"]) > 1:
    for number, addresses in enumerate(planning.batches(RUNS, RESULTS, int(SETTINGS["batch"]))):

        rule:
            name:
                f"records_{RUNS[addresses[0]].task}_{number}"
            output:
                [str(RUNS[address].path(RESULTS)) for address in addresses],
            params:
                addresses=" ".join(addresses),
                results=folder,
            threads: 1
            resources:
                gpu=gpus(addresses[0]),
            log:
                str(RESULTS / "logs" / f"{addresses[0]}.log"),
            shell:
                "OMP_NUM_THREADS={threads} {sys.executable} -m prunelab run-records {params.addresses} {OVERRIDES}"
                " --config results={params.results:q} >{log:q} 2>&1"

else:

    rule record:
        output:
            str(RESULTS / "records" / "{address}.json"),
        wildcard_constraints:
            address="|".join(address for batch in OPEN for address in batch) or "none",
        params:
            results=folder,
        threads: 1
        resources:
            gpu=lambda wildcards: gpus(wildcards.address),
        log:
            str(RESULTS / "logs" / "{address}.log"),
        shell:
            "OMP_NUM_THREADS={threads} {sys.executable} -m prunelab run-records {wildcards.address} {OVERRIDES}"
            " --config results={params.results:q} >{log:q} 2>&1"
