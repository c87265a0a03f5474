"""One self-contained page of plots and tables from the folders that runs and studies leave behind."""
