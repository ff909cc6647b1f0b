pytest_plugins = ["tools.pages", "pytester"]  # every block of every page is a test
