"""The farm's page: what :mod:`lazyfarm.records` and its like read, shown in a browser. Changes nothing."""
