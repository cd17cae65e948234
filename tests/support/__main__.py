import sys

from tests.support.run import main

sys.exit(main())
