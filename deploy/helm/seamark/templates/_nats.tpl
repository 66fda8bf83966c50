{{/* What the NATS chart's pods get, called from `nats:` in values.yaml: they run the files of `nats/` that the image brings. */}}

{{/* The variables that nats/cluster.conf and nats/accounts.conf read; a variable may hold those before it in the alphabet. */}}
{{- define "seamark.nats.env" -}}
{{- $nats := .Values.global.seamark.nats }}
{{- $name := include "seamark.nats.name" . }}
{{- $routes := list }}
{{- range $number := until (int .Values.config.cluster.replicas) }}
{{- $routes = append $routes (printf "\"nats://route:$(SEAMARK_NATS_CLUSTER_PASSWORD)@%s-%d.%s-headless:6222\"" $name $number $name) }}
{{- end -}}
SEAMARK_NATS_STORE: /data
SEAMARK_NATS_AZ: {valueFrom: {fieldRef: {fieldPath: {{ include "seamark.nats.place" . | quote }}}}}
SEAMARK_NATS_TAGS: '"az:$(SEAMARK_NATS_AZ)"'
SEAMARK_NATS_NAME: $(POD_NAME)
SEAMARK_NATS_ROUTES: {{ printf "[%s]" (join ", " $routes) | quote }}
{{- range $user := list "publisher" "dispatcher" "gateway" "projector" "planner" "pager" "worker" "operator" "provisioner" "backup" "system" "cluster" }}
SEAMARK_NATS_{{ upper $user }}_PASSWORD: {valueFrom: {secretKeyRef: {name: {{ $nats.passwordsSecret }}, key: {{ $user }}}}}
{{- end }}
{{- range $tenant := $nats.publishers }}
SEAMARK_NATS_PUBLISHER_{{ $tenant }}_PASSWORD: {valueFrom: {secretKeyRef: {name: {{ $nats.passwordsSecret }}, key: publisher-{{ $tenant }}}}}
{{- end }}
{{- end }}

{{/* Init containers that write the files. */}}
{{- define "seamark.nats.files" -}}
{{- $files := "/etc/seamark-nats/files" -}}
- name: files
  command:
    {{- include "seamark.sizeCommand" (dict "root" . "servers" .Values.config.cluster.replicas "to" $files) | nindent 4 }}
  {{- include "seamark.nats.filesContainer" . | nindent 2 }}
{{- range $number, $tenant := .Values.global.seamark.nats.publishers }}
- name: publisher-{{ $number }}
  command: [seamark, topology, publisher, {{ $tenant }}, --add-to={{ $files }}/accounts.conf]
  {{- include "seamark.nats.filesContainer" $ | nindent 2 }}
{{- end }}
{{- end }}

{{- define "seamark.nats.filesContainer" -}}
{{ include "seamark.containerHead" (dict "root" . "tag" "") }}
resources: {requests: {cpu: 100m, memory: 128Mi}, limits: {memory: 128Mi}}
volumeMounts:
  - {name: seamark-nats, mountPath: /etc/seamark-nats}
{{- end }}

{{/* Servers start anew when what they are told changes, one after the other. */}}
{{- define "seamark.nats.annotations" -}}
seamark/files: {{ pick .Values.global.seamark "image" "demand" "nats" | toJson | sha256sum }}
{{- end }}

{{- define "seamark.nats.spread" -}}
topology.kubernetes.io/zone: {maxSkew: 1, whenUnsatisfiable: {{ ternary "DoNotSchedule" "ScheduleAnyway" (eq .Values.global.seamark.nats.spreadOver "zone") }}}
kubernetes.io/hostname: {maxSkew: 1, whenUnsatisfiable: DoNotSchedule}
{{- end }}

{{/* Where a pod learns what its copies must not share. */}}
{{- define "seamark.nats.place" -}}
{{- if eq .Values.global.seamark.nats.spreadOver "node" -}}
spec.nodeName
{{- else if semverCompare ">=1.35.0-0" .Capabilities.KubeVersion.Version -}}
metadata.labels['topology.kubernetes.io/zone']
{{- else -}}
{{- fail "global.seamark.nats.spreadOver: `zone` needs Kubernetes 1.35, whose pods know their zone; choose `node`" -}}
{{- end }}
{{- end }}
