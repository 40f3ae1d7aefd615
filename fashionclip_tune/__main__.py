from fashionclip_tune.cli import main

main()
