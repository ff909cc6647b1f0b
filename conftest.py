pytest_plugins = ["tools.pages"]  # every block of every page is a test
