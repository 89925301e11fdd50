from prunelab.common.cli import main

main()
