from fashionclip_tune.cli.main import main

main()
