# What open finds after a crash, and how it is put right. Runs before the engine has the device, on one thread.
from datapath.device cimport Device
from datapath.journal cimport Journal

# Replays the journal, repairs the slot table in memory and the tags of dirty slots in their mapping (nothing is synced
# yet). `restored`: the superblock is an older one. Returns the summary that BlockDevice.recover documents, with "punch"
# (slots), "carry" ((volume, chunk, slot, epoch)) and "changed" (slots, a slot more than once maybe) in addition: what
# is still to be done.
cdef dict recover_device(Device* device, Journal* journal, bint restored, object name)
