"""The bytes: everything that touches user data, or decides something per IO, in Cython without the GIL.

Imports nothing of ours and knows no trio. The engines (``initiator`` in an SDC, ``target`` in an SDS) run on
threads of their own and talk to the trio side only through the mailbox in ``ring``.
"""
