from resformer.cli import main

main()
