//! The extlb device: a PCI DMA engine with its own page tables and TLB, served over vfio-user.
