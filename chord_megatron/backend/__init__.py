"""Everything that touches Megatron-Core, and nothing else. Importing it changes nothing in the process."""

from chord_megatron.backend.importing import import_megatron_core

import_megatron_core()
