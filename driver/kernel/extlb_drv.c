// SPDX-License-Identifier: GPL-2.0
/*
 * extlb: a device that works on a process's memory by virtual address, and
 * follows its page table. Probe and remove, interrupts, and the fence.
 */
#include <linux/bitfield.h>
#include <linux/dma-mapping.h>
#include <linux/idr.h>
#include <linux/interrupt.h>
#include <linux/io-64-nonatomic-lo-hi.h>
#include <linux/io.h>
#include <linux/iommu.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "extlb.h"

#define RING_LOG2	10

static DEFINE_IDA(extlb_ids);

static void free_dev(struct kref *ref)
{
	struct extlb_dev *dev = container_of(ref, struct extlb_dev, ref);

	cleanup_srcu_struct(&dev->srcu);
	pci_dev_put(dev->pdev);
	kvfree(dev);
}

void extlb_dev_put(struct extlb_dev *dev)
{
	kref_put(&dev->ref, free_dev);
}

/* The name can be given to another device, while files of this one are open. */
static void give_up(struct extlb_dev *dev)
{
	cancel_work_sync(&dev->dead_work);
	ida_free(&extlb_ids, dev->id);
	extlb_dev_put(dev);
}

/* Contexts end with an error, once the device is fenced off. */
static void dead_work(struct work_struct *work)
{
	struct extlb_dev *dev = container_of(work, struct extlb_dev, dead_work);
	struct extlb_ctx *ctx;

	spin_lock(&dev->ctx_lock);
	list_for_each_entry(ctx, &dev->files, node)
		wake_up_all(&ctx->wait);
	spin_unlock(&dev->ctx_lock);
}

/*
 * When it returns, the device does not access memory, and dev->dead says so.
 * Fit for atomic context. Return: whether it was this call that did it.
 *
 * Bus mastering goes first: a configuration write is not posted, and what the
 * device had written before is ahead of its completion. The reset is for a
 * device that still listens; the read behind it returns when the reset is done,
 * or all ones if nobody is there.
 */
static bool silence(struct extlb_dev *dev)
{
	bool first;

	/* Whoever comes second returns when the device is silent, too. */
	spin_lock(&dev->fence_lock);
	first = !dev->dead;
	if (first) {
		pci_clear_master(dev->pdev);
		writel(EXTLB_CTRL_RESET, dev->regs + EXTLB_REG_CTRL);
		readl(dev->regs + EXTLB_REG_CTRL);
		/* Pairs with extlb_is_dead(). */
		smp_store_release(&dev->dead, true);
		schedule_work(&dev->dead_work);
	}
	spin_unlock(&dev->fence_lock);
	return first;
}

/**
 * extlb_fence() - the device cannot be trusted any more: silence it
 * @dev: the device
 * @reason: why, for the log
 *
 * When it returns, the device does not access memory, and dev->dead says so.
 * Fit for atomic context. It is slow, and the last resort.
 */
void extlb_fence(struct extlb_dev *dev, const char *reason)
{
	if (silence(dev))
		dev_err(&dev->pdev->dev,
			"%s; the device is fenced off, all its contexts are over; unbind and bind the driver to start anew\n",
			reason);
}

/* A 64-bit register; 0 if the device is dead. Slow: not for hot paths. */
u64 extlb_read_counter(struct extlb_dev *dev, u32 reg)
{
	u64 value;

	if (extlb_is_dead(dev))
		return 0;
	value = readq(dev->regs + reg);
	if (value == U64_MAX && readl(dev->regs + EXTLB_REG_ID) == U32_MAX) {
		extlb_fence(dev, "the device is gone: registers read all ones");
		return 0;
	}
	return value;
}

/* The device has stopped for an error, and says which. */
void extlb_fatal(struct extlb_dev *dev)
{
	char reason[80];

	snprintf(reason, sizeof(reason), "fatal error %u about %#llx",
		 readl(dev->regs + EXTLB_REG_ERROR),
		 readq(dev->regs + EXTLB_REG_ERROR_INFO));
	extlb_fence(dev, reason);
}

static irqreturn_t error_irq(int irq, void *data)
{
	struct extlb_dev *dev = data;

	if (!extlb_is_dead(dev) &&
	    readl(dev->regs + EXTLB_REG_STATUS) & EXTLB_STATUS_FATAL)
		extlb_fatal(dev);
	return IRQ_HANDLED;
}

static irqreturn_t page_request_irq(int irq, void *data)
{
	extlb_prq_consume(data);
	return IRQ_HANDLED;
}

/* Wakes those whose count of completions has moved. */
void extlb_wake_completed(struct extlb_dev *dev)
{
	struct extlb_ctx *ctx;
	u32 i, seq;

	for (i = 0; i < dev->contexts; i++) {
		ctx = extlb_ctx_get(dev, i);
		if (!ctx)
			continue;
		seq = READ_ONCE(ctx->shadow->event_seq);
		/* The interrupt's handler and the watchdog may both be here. */
		if (xchg(&ctx->events_seen, seq) != seq)
			wake_up_all(&ctx->wait);
		extlb_ctx_put(ctx);
	}
}

/* One interrupt for all contexts. */
static irqreturn_t completion_irq(int irq, void *data)
{
	extlb_wake_completed(data);
	return IRQ_HANDLED;
}

static int request_irqs(struct extlb_dev *dev)
{
	/* Nothing here waits by interrupt for an invalidation. */
	static const struct {
		unsigned int vector;
		irq_handler_t thread;
		const char *name;
	} irqs[] = {
		{ EXTLB_VECTOR_ERROR, error_irq, "error" },
		{ EXTLB_VECTOR_PAGE_REQUEST, page_request_irq, "page-request" },
		{ EXTLB_VECTOR_COMPLETION, completion_irq, "completion" },
	};
	struct device *parent = &dev->pdev->dev;
	int i, ret;

	ret = pci_alloc_irq_vectors(dev->pdev, EXTLB_VECTORS, EXTLB_VECTORS,
				    PCI_IRQ_MSIX);
	if (ret < 0)
		return dev_err_probe(parent, ret, "no %u MSI-X vectors\n",
				     EXTLB_VECTORS);
	for (i = 0; i < ARRAY_SIZE(irqs); i++) {
		ret = request_threaded_irq(pci_irq_vector(dev->pdev, irqs[i].vector),
					   NULL, irqs[i].thread, IRQF_ONESHOT,
					   devm_kasprintf(parent, GFP_KERNEL, "%s-%s",
							  dev->name, irqs[i].name),
					   dev);
		if (ret)
			goto free;
	}
	return 0;

free:
	while (i--)
		free_irq(pci_irq_vector(dev->pdev, irqs[i].vector), dev);
	pci_free_irq_vectors(dev->pdev);
	return ret;
}

static void free_irqs(struct extlb_dev *dev)
{
	free_irq(pci_irq_vector(dev->pdev, EXTLB_VECTOR_ERROR), dev);
	free_irq(pci_irq_vector(dev->pdev, EXTLB_VECTOR_PAGE_REQUEST), dev);
	free_irq(pci_irq_vector(dev->pdev, EXTLB_VECTOR_COMPLETION), dev);
	pci_free_irq_vectors(dev->pdev);
}

static bool is_translated(struct device *parent)
{
#if IS_ENABLED(CONFIG_IOMMU_API)
	struct iommu_domain *domain = iommu_get_domain_for_dev(parent);

	return domain && domain->type != IOMMU_DOMAIN_IDENTITY;
#else
	return false;
#endif
}

/*
 * The leaves of the device's page tables hold physical addresses: they come and
 * go with the cpu ptes, under locks under which nothing can be mapped for an
 * IOMMU. So there must be none that translates. Memory of the driver's own
 * rings goes the usual way of the DMA API.
 */
static int check_iommu(struct extlb_dev *dev)
{
	struct device *parent = &dev->pdev->dev;

	if (!is_translated(parent))
		return 0;
	return dev_err_probe(parent, -EOPNOTSUPP,
			     "an IOMMU translates for the device, and would have to map each page it follows; boot with iommu=pt or without the IOMMU\n");
}

static int map_registers(struct extlb_dev *dev)
{
	struct pci_dev *pdev = dev->pdev;
	u32 id, version;

	if (pci_resource_len(pdev, EXTLB_BAR_DOORBELLS) <
	    (u64)EXTLB_DOORBELL_STRIDE * EXTLB_MAX_CONTEXTS)
		return dev_err_probe(&pdev->dev, -ENODEV, "no BAR of doorbells\n");
	dev->doorbells = pci_resource_start(pdev, EXTLB_BAR_DOORBELLS);

	dev->regs = pcim_iomap(pdev, EXTLB_BAR_REGS, 0);
	if (!dev->regs)
		return dev_err_probe(&pdev->dev, -ENODEV, "no BAR of registers\n");
	id = readl(dev->regs + EXTLB_REG_ID);
	version = readl(dev->regs + EXTLB_REG_VERSION);
	if (id != EXTLB_ID_VALUE ||
	    version >> 16 != EXTLB_VERSION_VALUE >> 16)
		return dev_err_probe(&pdev->dev, -ENODEV,
				     "id %#x, version %#x: want %#x and %#x\n",
				     id, version, EXTLB_ID_VALUE,
				     EXTLB_VERSION_VALUE);
	dev->cap = readq(dev->regs + EXTLB_REG_CAP);
	dev->contexts = min_t(u32, EXTLB_MAX_CONTEXTS,
			      BIT(min_t(u32, 31, dev->cap & EXTLB_CAP_CONTEXTS_LOG2_MASK)));
	return 0;
}

static int alloc_rings(struct extlb_dev *dev)
{
	struct device *parent = &dev->pdev->dev;
	u32 ring_log2 = min_t(u32, RING_LOG2,
			      FIELD_GET(EXTLB_CAP_RING_LOG2_MASK, dev->cap));
	struct extlb_prq *prq = &dev->prq;
	struct extlb_iq *iq = &dev->iq;

	if (ring_log2 < EXTLB_RING_LOG2_MIN)
		return dev_err_probe(parent, -ENODEV, "rings too small\n");
	iq->entries = BIT(ring_log2);
	prq->entries = BIT(ring_log2);

	dev->shadow = dmam_alloc_coherent(parent, sizeof(*dev->shadow),
					  &dev->shadow_dma, GFP_KERNEL);
	dev->table = dmam_alloc_coherent(parent, PAGE_ALIGN(dev->contexts *
							    sizeof(*dev->table)),
					 &dev->table_dma, GFP_KERNEL);
	iq->ring = dmam_alloc_coherent(parent, PAGE_ALIGN(iq->entries *
							  sizeof(*iq->ring)),
				       &iq->dma, GFP_KERNEL);
	prq->ring = dmam_alloc_coherent(parent, PAGE_ALIGN(prq->entries *
							   sizeof(*prq->ring)),
					&prq->dma, GFP_KERNEL);
	if (!dev->shadow || !dev->table || !iq->ring || !prq->ring)
		return -ENOMEM;
	return 0;
}

/* Silent when it returns. */
static void reset(struct extlb_dev *dev)
{
	writel(EXTLB_CTRL_RESET, dev->regs + EXTLB_REG_CTRL);
	readl(dev->regs + EXTLB_REG_CTRL);
}

static int enable(struct extlb_dev *dev)
{
	void __iomem *regs = dev->regs;
	u32 status;

	writeq(dev->table_dma, regs + EXTLB_REG_CTX_TABLE);
	writel(dev->contexts, regs + EXTLB_REG_CTX_COUNT);
	writeq(dev->iq.dma, regs + EXTLB_REG_IQ_BASE);
	writel(ilog2(dev->iq.entries), regs + EXTLB_REG_IQ_LOG2);
	writeq(dev->prq.dma, regs + EXTLB_REG_PRQ_BASE);
	writel(ilog2(dev->prq.entries), regs + EXTLB_REG_PRQ_LOG2);
	writeq(dev->shadow_dma, regs + EXTLB_REG_SHADOW);
	/* Until it says otherwise the device wants to be kicked. */
	dev->shadow->iq_need_kick = 1;
	writel(EXTLB_CTRL_ENABLE, regs + EXTLB_REG_CTRL);
	status = readl(regs + EXTLB_REG_STATUS);
	if (status != EXTLB_STATUS_ENABLED)
		return dev_err_probe(&dev->pdev->dev, -EIO,
				     "the device does not start: status %#x, error %u about %#llx\n",
				     status, readl(regs + EXTLB_REG_ERROR),
				     readq(regs + EXTLB_REG_ERROR_INFO));
	return 0;
}

static struct extlb_dev *alloc_dev(struct pci_dev *pdev)
{
	struct extlb_dev *dev = kvzalloc(sizeof(*dev), GFP_KERNEL);

	if (!dev)
		return ERR_PTR(-ENOMEM);
	dev->id = ida_alloc(&extlb_ids, GFP_KERNEL);
	if (dev->id < 0)
		goto free;
	if (init_srcu_struct(&dev->srcu))
		goto free_id;
	kref_init(&dev->ref);
	dev->pdev = pci_dev_get(pdev);
	snprintf(dev->name, sizeof(dev->name), "extlb%d", dev->id);
	init_rwsem(&dev->sem);
	spin_lock_init(&dev->fence_lock);
	spin_lock_init(&dev->ctx_lock);
	spin_lock_init(&dev->iq.lock);
	mutex_init(&dev->prq.lock);
	mutex_init(&dev->audit_lock);
	mutex_init(&dev->oracle_lock);
	INIT_LIST_HEAD(&dev->files);
	INIT_WORK(&dev->dead_work, dead_work);
	extlb_watchdog_init(dev);
	dev->misc = (struct miscdevice) {
		.minor = MISC_DYNAMIC_MINOR,
		.name = dev->name,
		.fops = &extlb_fops,
		.parent = &pdev->dev,
		.mode = 0666,
	};
	return dev;

free_id:
	ida_free(&extlb_ids, dev->id);
free:
	kvfree(dev);
	return ERR_PTR(-ENOMEM);
}

static int extlb_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct extlb_dev *dev;
	int ret;

	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;
	ret = pci_request_regions(pdev, KBUILD_MODNAME);
	if (ret)
		return ret;
	ret = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(52));
	if (ret)
		return ret;

	dev = alloc_dev(pdev);
	if (IS_ERR(dev))
		return PTR_ERR(dev);
	ret = check_iommu(dev) ?: map_registers(dev);
	if (ret)
		goto put;
	reset(dev);
	ret = alloc_rings(dev);
	if (ret)
		goto put;

	ret = -ENOMEM;
	/* A work item of each context may sleep in a fault, for long. */
	dev->wq = alloc_workqueue("%s", WQ_UNBOUND, WQ_MAX_ACTIVE, dev->name);
	if (!dev->wq)
		goto put;
	ret = request_irqs(dev);
	if (ret)
		goto destroy_wq;
	pci_set_master(pdev);
	ret = enable(dev);
	if (ret)
		goto stop;
	pci_set_drvdata(pdev, dev);
	ret = misc_register(&dev->misc);
	if (ret)
		goto stop;
	extlb_hmm_add(dev);
	extlb_debugfs_add(dev);
	dev_info(&pdev->dev, "%s: %u contexts%s\n", dev->name, dev->contexts,
		 dev->cap & EXTLB_CAP_ORACLE ? ", oracle" : "");
	return 0;

stop:
	reset(dev);
	pci_clear_master(pdev);
	free_irqs(dev);
destroy_wq:
	destroy_workqueue(dev->wq);
put:
	give_up(dev);
	return ret;
}

/*
 * Files may stay open. Their contexts are closed here, after which nothing of
 * theirs comes near the device: no system call (removed), no callback of the
 * memory manager (unregistered), no doorbell (unmapped), no work.
 */
static void extlb_remove(struct pci_dev *pdev)
{
	struct extlb_dev *dev = pci_get_drvdata(pdev);
	struct extlb_ctx *ctx;

	misc_deregister(&dev->misc);
	extlb_hmm_remove(dev);
	extlb_debugfs_remove(dev);
	if (readl(dev->regs + EXTLB_REG_ID) != EXTLB_ID_VALUE)
		extlb_fence(dev, "the device is gone");

	down_write(&dev->sem);
	WRITE_ONCE(dev->removed, true);
	synchronize_srcu(&dev->srcu);
	/* Only who holds the semaphore removes from the list. */
	list_for_each_entry(ctx, &dev->files, node) {
		extlb_ctx_close(ctx);
		unmap_mapping_range(ctx->mapping, EXTLB_MMAP_DOORBELL,
				    EXTLB_DOORBELL_STRIDE, true);
	}
	up_write(&dev->sem);
	extlb_watchdog_stop(dev);

	/* Waits until a fence on another CPU is done, too. */
	spin_lock(&dev->fence_lock);
	reset(dev);
	pci_clear_master(pdev);
	/* Pairs with extlb_is_dead(). */
	smp_store_release(&dev->dead, true);
	spin_unlock(&dev->fence_lock);

	free_irqs(dev);
	destroy_workqueue(dev->wq);
	give_up(dev);
}

/* Somebody resets the function: what ran on it is lost, and must know. */
static void extlb_reset_prepare(struct pci_dev *pdev)
{
	if (silence(pci_get_drvdata(pdev)))
		dev_notice(&pdev->dev,
			   "the function is being reset, all its contexts are over; unbind and bind the driver to start anew\n");
}

static const struct pci_error_handlers extlb_err_handlers = {
	.reset_prepare = extlb_reset_prepare,
};

static const struct pci_device_id extlb_table[] = {
	{ PCI_DEVICE(EXTLB_PCI_VENDOR_ID, EXTLB_PCI_DEVICE_ID) },
	{ }
};
MODULE_DEVICE_TABLE(pci, extlb_table);

static struct pci_driver extlb_driver = {
	.name = KBUILD_MODNAME,
	.id_table = extlb_table,
	.probe = extlb_probe,
	.remove = extlb_remove,
	.shutdown = extlb_remove,
	.err_handler = &extlb_err_handlers,
};

static int __init extlb_init(void)
{
	int ret;

	if (!extlb_follow_default())
		return -EINVAL;
	extlb_debugfs_init();
	ret = pci_register_driver(&extlb_driver);
	if (ret)
		extlb_debugfs_exit();
	return ret;
}
module_init(extlb_init);

static void __exit extlb_exit(void)
{
	pci_unregister_driver(&extlb_driver);
	extlb_debugfs_exit();
	ida_destroy(&extlb_ids);
}
module_exit(extlb_exit);

MODULE_DESCRIPTION("Device that follows the page tables of processes");
MODULE_LICENSE("GPL");
