// A library to preload, with which "ethtool -m" shows the module EEPROM in the
// file $MODULE_EEPROM, as if a network interface had it; $MODULE_TYPE is one of
// ETH_MODULE_*. ethtool asks by netlink first, which is refused here, and then
// by ioctl.
#include <errno.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static unsigned char image[4096];

static size_t load(void)
{
	FILE *f = fopen(getenv("MODULE_EEPROM"), "rb");
	size_t n;

	if (!f)
		abort();
	n = fread(image, 1, sizeof(image), f);
	fclose(f);
	return n;
}

int socket(int domain, int type, int protocol)
{
	if (domain == AF_NETLINK) {
		errno = EAFNOSUPPORT;
		return -1;
	}
	return syscall(SYS_socket, domain, type, protocol);
}

int ioctl(int fd, unsigned long request, ...)
{
	struct ethtool_modinfo *info;
	struct ethtool_eeprom *ee;
	size_t n = load();
	va_list ap;
	void *arg, *data;

	va_start(ap, request);
	arg = va_arg(ap, void *);
	va_end(ap);
	if (request != SIOCETHTOOL)
		return syscall(SYS_ioctl, fd, request, arg);
	data = ((struct ifreq *)arg)->ifr_data;
	switch (*(__u32 *)data) {
	case ETHTOOL_GMODULEINFO:
		info = data;
		info->type = atoi(getenv("MODULE_TYPE"));
		info->eeprom_len = n;
		return 0;
	case ETHTOOL_GMODULEEEPROM:
		ee = data;
		if (ee->offset > n || ee->len > n - ee->offset)
			break;
		memcpy(ee->data, image + ee->offset, ee->len);
		return 0;
	}
	errno = EOPNOTSUPP;
	return -1;
}
