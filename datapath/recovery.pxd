# What open finds after a crash, and how it is put right. Runs before the engine has the device, on one thread.
from datapath.device cimport Device
from datapath.journal cimport Journal

# Replays the journal, repairs the slot table and the tags of dirty slots in their mappings (nothing is synced yet).
# Returns the summary that BlockDevice.recover documents, with "punch" (slots) and "carry" ((volume, chunk, slot,
# epoch)) in addition: what is still to be done.
cdef dict recover_device(Device* device, Journal* journal, object name)
