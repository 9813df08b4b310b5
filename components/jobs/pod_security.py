"""The restricted Pod Security Standard of Kubernetes 1.34. Reports everything that admission would refuse.

https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
"""

from collections.abc import Iterator, Mapping
from typing import Any

Manifest = Mapping[str, Any]
STANDARD = "(restricted Pod Security Standard)"
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip
APPARMOR = "container.apparmor.security.beta.kubernetes.io/"
CONFINED = {"RuntimeDefault", "Localhost"}
"""Allowed types of a seccomp or AppArmor profile."""


def violations(pod: Manifest) -> Iterator[str]:
    """Each rule of the standard that a pod or pod template breaks."""
    found = [*_pod(pod)]
    for container in containers(pod):
        found += [f"container {container.get('name')}: {rule}" for rule in _container(pod, container)]
    yield from (f"{rule} {STANDARD}." for rule in found)


def containers(pod: Manifest) -> list[Manifest]:
    spec = pod.get("spec") or {}
    return [item for key in ("initContainers", "containers", "ephemeralContainers") for item in spec.get(key) or []]


def _pod(pod: Manifest) -> Iterator[str]:
    spec = pod.get("spec") or {}
    context = spec.get("securityContext") or {}
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key} must be unset"
    for volume in spec.get("volumes") or []:
        if other := set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume.get('name')} must not be {', '.join(sorted(other))}"
    if unsafe := {str(item.get("name")) for item in context.get("sysctls") or []} - SYSCTLS:
        yield f"sysctls must not hold {', '.join(sorted(unsafe))}"
    for key, value in ((pod.get("metadata") or {}).get("annotations") or {}).items():
        confined = value in ("", "runtime/default") or str(value).startswith("localhost/")
        if key.startswith(APPARMOR) and not confined:
            yield f"annotation {key} must be runtime/default or localhost/…, got {value!r}"
    if context.get("runAsNonRoot") is False:
        yield "securityContext.runAsNonRoot of the pod must not be false"
    yield from _context(context)


def _container(pod: Manifest, container: Manifest) -> Iterator[str]:
    spec = pod.get("spec") or {}
    outer, own = spec.get("securityContext") or {}, container.get("securityContext") or {}
    if ports := [port["hostPort"] for port in container.get("ports") or [] if port.get("hostPort")]:
        yield f"hostPort must be unset, got {ports[0]}"
    if own.get("privileged"):
        yield "privileged must be unset"
    if own.get("procMount") not in (None, "Default"):
        yield "procMount must be unset"
    if own.get("runAsNonRoot", outer.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot must be true"
    yield from (f"{place} must not name a host, got {host!r}" for place, host in _hosts(container))
    yield from _context(own)
    if (spec.get("os") or {}).get("name") == "windows":
        return
    capabilities = own.get("capabilities") or {}
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation must be false"
    if "ALL" not in (capabilities.get("drop") or []):
        yield "capabilities.drop must hold ALL"
    if added := set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield f"capabilities.add must not hold {', '.join(sorted(added))}"
    if not (own.get("seccompProfile") or outer.get("seccompProfile")):
        yield "seccompProfile.type must be RuntimeDefault or Localhost"


def _context(context: Manifest) -> Iterator[str]:
    """Rules that apply to the security contexts of both pods and containers."""
    if context.get("runAsUser") == 0:
        yield "runAsUser must not be 0"
    for key in ("seccompProfile", "appArmorProfile"):
        if (profile := context.get(key)) and profile.get("type") not in CONFINED:
            yield f"{key}.type must be RuntimeDefault or Localhost, got {profile.get('type')!r}"
    options = context.get("seLinuxOptions") or {}
    if options.get("type", "") not in SELINUX_TYPES:
        yield f"seLinuxOptions.type must be one of the container types, got {options['type']!r}"
    for key in ("user", "role"):
        if options.get(key):
            yield f"seLinuxOptions.{key} must be unset, got {options[key]!r}"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield "windowsOptions.hostProcess must be unset"


def _hosts(container: Manifest) -> Iterator[tuple[str, str]]:
    """Hosts in probes and lifecycle handlers of a container."""
    handlers = {key: container.get(key) for key in ("livenessProbe", "readinessProbe", "startupProbe")}
    handlers |= {f"lifecycle.{key}": value for key, value in (container.get("lifecycle") or {}).items()}
    for place, handler in handlers.items():
        for action in ("httpGet", "tcpSocket"):
            if host := ((handler or {}).get(action) or {}).get("host"):
                yield f"{place}.{action}", host
