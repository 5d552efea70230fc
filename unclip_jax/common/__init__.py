"""What every room uses: files, settings, command lines, picture grids."""
